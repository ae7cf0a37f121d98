"""From stored rows and a protocol to decisions and words."""
