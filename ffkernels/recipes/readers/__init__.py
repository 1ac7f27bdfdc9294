"""Readers of data sets on disk, a file for each format.

A reader's `find(folder)` says where in a folder there is data of its format, and what that data set is called: by names
of files alone, nothing is opened. Its `read(place, name)` gives the data set, or an error that names the file.
"""
