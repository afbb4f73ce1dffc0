"""What the data is: prepared datasets, the demo, and cached features. (Kept light: Hugging Face's library has this name
too, and its users may import it from here by accident.)"""
