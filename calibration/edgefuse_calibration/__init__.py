"""The spoken corpus that edgefuse trains and verifies with: sentences, synthetic voices, rooms and noise."""
