package cli

import (
	"log/slog"
	"net"
	"os"
)

// notifySystemd tells systemd of a change, where it asks for that (Type=notify): READY=1 or STOPPING=1.
func notifySystemd(logger *slog.Logger, state string) {
	socket := os.Getenv("NOTIFY_SOCKET") // "@" at its beginning is what package net means by it, too
	if socket == "" {
		return
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err == nil {
		_, err = conn.Write([]byte(state))
		_ = conn.Close() // a datagram is sent or not
	}
	if err != nil {
		logger.Warn("systemd is not told", "state", state, "error", err)
	}
}
