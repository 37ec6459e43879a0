"""Every flag: sections, their rules, and how they are read from a command line or YAML."""
