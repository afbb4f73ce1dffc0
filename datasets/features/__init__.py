"""What items are described by: text, pictures, arrays from files; encoded once and cached."""
