"""The live view: the report's numbers in a browser while a run goes on. Reads run directories; never writes to one."""
