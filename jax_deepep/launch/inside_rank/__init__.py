"""What runs in the ranks; everything beside this folder starts and watches them."""
