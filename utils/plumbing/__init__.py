"""The plumbing: settings, lists, files, processes and messages. A student need not enter it."""
