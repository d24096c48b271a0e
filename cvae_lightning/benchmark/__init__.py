"""Tasks × recipes × seeds, trained and tested by the public commands, as one table and its figures."""
