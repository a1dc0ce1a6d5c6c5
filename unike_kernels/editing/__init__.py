"""Making edits: states from triplets, encoders and zeta, neurons."""
