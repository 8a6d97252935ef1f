"""The rivals, called the way their own users call them. One file per library."""
