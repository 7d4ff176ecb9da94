"""Studies beyond AP: upper bounds of codecs, types of errors, bootstrap intervals, attention, efficiency."""
