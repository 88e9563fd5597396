"""What people do to a server: each attack is a function that gets a `Bench` and gives rows of the table."""
