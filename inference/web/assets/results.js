// A new list: the open feature is marked in it, too.
watch('value', markOpened);
