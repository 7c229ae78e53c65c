"""The bodies of the commands; each is an example of how to use the package, too."""
