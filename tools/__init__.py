"""What only maintainers of this repository use."""
