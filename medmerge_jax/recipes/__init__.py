"""What a user asks for, as compositions of stages."""
