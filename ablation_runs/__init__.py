"""Studies: a question, a base command, variants that differ in the flags named, seeds."""
