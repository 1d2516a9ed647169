"""The HTTP interface: thin handlers over the platform's services."""
