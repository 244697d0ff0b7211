"""Official AIM weights in and out: a released file becomes a run directory, a run becomes a released file.

Files are copied tensor by tensor through mapped memory, so that importing 7B parameters needs memory for about one
tensor. No pickled code is executed.
"""
