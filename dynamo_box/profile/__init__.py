"""What a person asks for: profiles, the model catalogue and the model store."""
