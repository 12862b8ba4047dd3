"""The command line: one small module a verb, torch imported only once a verb runs."""
