import hypothesis

# The first example of a test compiles, so that examples differ too much in time for a deadline.
hypothesis.settings.register_profile("merging", deadline=None, max_examples=50)
hypothesis.settings.load_profile("merging")
