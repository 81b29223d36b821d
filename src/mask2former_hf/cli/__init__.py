"""The `mask2former-hf` command; one file per subcommand."""
