"""What people see: rows first, rendering after."""
