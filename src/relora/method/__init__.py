"""The method: low-rank layers, restarts, optimizer resets and schedules for any nn.Module; torch only."""
