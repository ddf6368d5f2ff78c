"""What trains and makes the things that ship; not part of the wheel."""
