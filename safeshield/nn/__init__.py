"""What every algorithm's networks are made of."""
