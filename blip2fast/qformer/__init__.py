"""The Q-Former: the drop-in module and its packed form."""
