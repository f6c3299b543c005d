"""Domain mixes: how often each domain is drawn, fixed or learned from rewards."""
