"""What a report is made of: runs read, scored, aggregated over tasks, drawn and written."""
