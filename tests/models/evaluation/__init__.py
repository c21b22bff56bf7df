"""Real libraries' models, and how a start of ours is compared with a library's own. Importing builds nothing."""
