"""Does an artifact still hear what the model heard?"""
