"""KL to exact targets: what the teacher says about the student's next token (`xtoken.targets`)."""
