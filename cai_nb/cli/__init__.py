"""The commands of `cai-nb`."""
