"""The command line: configuration, trainer, commands. Imports everything; nothing imports it."""
