"""What a compressed checkpoint needs in order to live; the files of this folder are copied into every checkpoint."""
