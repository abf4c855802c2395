"""The untrusted party: exposed matrices and a service that multiplies by them. Imports nothing that handles secrets."""
