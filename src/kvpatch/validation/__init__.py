"""The whole pipeline run against organisms, models whose truth is planted."""
