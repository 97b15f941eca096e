"""What people look at: figures on record, trackers, pictures, reports and tables of several runs."""
