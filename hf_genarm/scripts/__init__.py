"""The bodies of the commands, which are also examples of how to use the package."""
