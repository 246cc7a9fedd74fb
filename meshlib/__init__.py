"""Who computes: meshes, transports, records of communication, random bits, errors."""
