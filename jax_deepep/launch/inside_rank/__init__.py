"""What runs in the ranks; the rest of the launcher starts and watches them."""
