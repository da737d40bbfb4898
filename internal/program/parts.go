package program

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
)

// parts are what a program has started, in order.
type parts struct {
	names []string
	stops []func(context.Context) error
}

func (p *parts) add(name string, stop func(context.Context) error) {
	p.names = append(p.names, name)
	p.stops = append(p.stops, stop)
}

// stop stops all parts, the last one first. A part that fails keeps none of the
// others running.
func (p *parts) stop(ctx context.Context) error {
	var errs []error
	for i, stop := range slices.Backward(p.stops) {
		if err := stop(ctx); err != nil {
			errs = append(errs, fmt.Errorf("stop %s: %w", p.names[i], err))
		}
	}
	p.names, p.stops = nil, nil
	return errors.Join(errs...)
}

// ignoreClosed drops the error of closing what a server has closed already.
func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// ignoreCanceled drops the error with which an etcd client says that it was
// closed.
func ignoreCanceled(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}
