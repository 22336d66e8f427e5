"""What each loss compares at each chunk, with the probabilities of real models.

Every number is the library's own: the losses are called as in training, on this one text, and what
they compare is read off their blocks. Nothing of a loss is written down a second time.
"""
