"""The table of image-caption pairs, the space in which its rows are compared, and the search for nearest rows."""
