"""The command line: what a person decides or wants to see."""
