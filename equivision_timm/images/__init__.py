"""Images: read from files, rotated, cropped; as a data set for timm's scripts."""
