"""Numbers measured on a trial, one readout a file."""
