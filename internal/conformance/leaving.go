package conformance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/status"

	pubsub "github.com/push-manager/push-manager/proto"
)

// pings is how many it takes until a server that allows none has had enough.
const pings = 4

// ping speaks HTTP/2 itself: gRPC for Go does not ping as often as a node has to allow.
func ping(ctx context.Context, address string, pause time.Duration) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	var out bytes.Buffer
	out.WriteString(http2.ClientPreface)
	if err := http2.NewFramer(&out, nil).WriteSettings(); err != nil {
		return err
	}
	if _, err := conn.Write(out.Bytes()); err != nil {
		return err
	}
	framer := http2.NewFramer(conn, conn)
	for i := byte(1); i <= pings+1; i++ {
		if err := framer.WritePing(false, [8]byte{i}); err != nil {
			return fmt.Errorf("ping %d: %w", i, err)
		}
		if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			return err
		}
		for answered := false; !answered; {
			f, err := framer.ReadFrame()
			if err != nil {
				return fmt.Errorf("the connection ended at ping %d: %w", i, err)
			}
			switch f := f.(type) {
			case *http2.SettingsFrame:
				if !f.IsAck() {
					err = framer.WriteSettingsAck()
				}
			case *http2.GoAwayFrame:
				return fmt.Errorf("the connection was ended at ping %d: %v %q", i, f.ErrCode, f.DebugData())
			case *http2.PingFrame:
				if answered = f.IsAck(); !answered {
					err = framer.WritePing(true, f.Data)
				}
			}
			if err != nil {
				return err
			}
		}
		if i > pings {
			return nil
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return context.Cause(ctx)
		}
	}
	return nil
}

// leaving is the last check: there is no node after it.
func leaving(ctx context.Context, t *tester) error {
	if t.cfg.Drain == nil {
		return &skipped{"needs a way to ask the node to leave"}
	}
	if !t.streaming {
		return t.leavesUnary(ctx)
	}
	var links []*link
	for range 2 {
		l, err := t.open(ctx, nil)
		if err != nil {
			return err
		}
		defer l.close()
		d, _ := t.to(t.cfg.Absent)
		if _, err := l.ask(ctx, d); err != nil {
			return err
		}
		links = append(links, l)
	}
	if err := t.cfg.Drain(ctx); err != nil {
		return fmt.Errorf("ask the node to leave: %w", err)
	}
	for _, l := range links {
		if err := l.until(ctx, "drain", func() bool { return l.drained }); err != nil {
			return err
		}
	}
	// They have crossed the notice on the wire, as far as the node knows.
	targets := [][]string{{t.cfg.Absent}}
	if len(t.cfg.Users) > 0 {
		targets = append(targets, t.cfg.Users[:1])
	}
	for _, l := range links {
		for _, users := range targets {
			d, _ := t.to(users...)
			o, err := l.ask(ctx, d)
			if err != nil {
				return fmt.Errorf("a delivery after the notice: %w", err)
			}
			if !o.refused {
				return fmt.Errorf("a delivery after the notice is not refused: delivered to %d", o.delivered)
			}
		}
		if err := l.write(&pubsub.DeliverRequest{Drain: true}); err != nil {
			return err
		}
	}
	return nil
}

// leavesUnary waits until the node says that it does nothing, or is gone.
func (t *tester) leavesUnary(ctx context.Context) error {
	if err := t.cfg.Drain(ctx); err != nil {
		return fmt.Errorf("ask the node to leave: %w", err)
	}
	deadline := time.Now().Add(5*time.Second + t.cfg.Within)
	for time.Now().Before(deadline) {
		one, cancel := context.WithTimeout(ctx, t.cfg.Within)
		err := t.unaryWorks(one)
		cancel()
		if err == nil {
			time.Sleep(5 * time.Millisecond)
			continue
		}
		if refuses(status.Code(err)) || isClosed(ctx, t.cfg.Address) {
			return nil
		}
		return fmt.Errorf("a call after the notice ends with %w, which does not say that nothing was done", err)
	}
	return errors.New("it goes on as before")
}

// isClosed tells whether nobody listens at the port: a call to it reaches nobody.
func isClosed(ctx context.Context, address string) bool {
	d := net.Dialer{Timeout: time.Second}
	conn, err := d.DialContext(ctx, "tcp", address)
	if err == nil {
		_ = conn.Close()
	}
	return err != nil
}
