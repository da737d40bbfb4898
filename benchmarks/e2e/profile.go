package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"
)

// Profiles loads Push-Manager with each of user, stream, room and open, or those
// named, and writes a CPU profile and one of its allocations meanwhile into dir. The
// rivals echo and floor, when named, get the load of user; tlsuser, tlsstream and tlsbatch,
// when named, are what they say over TLS, and json is user in JSON.
func (b *Bench) Profiles(ctx context.Context, dir string, d time.Duration, names []string) (files []string, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // results are for everybody
		return nil, err
	}
	w, err := b.usual(ctx)
	if err != nil {
		return nil, err
	}
	defer w.Close(context.WithoutCancel(ctx))
	for _, load := range b.usualLoads() {
		if !slices.Contains(names, load.name) && (len(names) > 0 || load.special()) {
			continue
		}
		pm, err := w.profiled(ctx, &load)
		if err != nil {
			return files, err
		}
		if err := pm.Warm(ctx, load.Work); err != nil {
			return files, err
		}
		load.Target = pm.Name
		load.Duration = d + 2*time.Second
		written, err := b.profile(ctx, pm, load.Load, filepath.Join(dir, load.name), d)
		files = append(files, written...)
		if err != nil {
			return files, fmt.Errorf("profile %s: %w", load.name, err)
		}
	}
	return files, nil
}

// profiled is a rival, or else a new Push-Manager, so that allocations are of one load.
func (w *World) profiled(ctx context.Context, load *named) (*Server, error) {
	switch {
	case load.rival != "":
		return w.Rival(ctx, load.rival)
	case load.tls:
		e, err := w.bench.entrances()
		if err != nil {
			return nil, err
		}
		return w.pushManager(ctx, load.name, w.bench.binary, e.tls.env, e.tls.as)
	case load.Work.JSON:
		return w.overHTTP(ctx, access{JSON: true})
	default:
		return w.PushManager(ctx)
	}
}

func (b *Bench) profile(ctx context.Context, pm *Server, load Load, prefix string, d time.Duration) (files []string, err error) {
	loaded := make(chan error, 1)
	go func() { // ends with the load, whose time is bounded
		_, err := b.run(ctx, load)
		loaded <- err
	}()
	for _, p := range []struct{ file, path string }{
		{prefix + ".cpu.pb.gz", "profile?seconds=" + strconv.Itoa(int(d.Seconds()))},
		{prefix + ".allocs.pb.gz", "allocs"},
	} {
		var body []byte
		if body, err = get(ctx, b.client, "http://"+pm.where.Ops+"/debug/pprof/"+p.path); err != nil {
			break
		}
		if err = os.WriteFile(p.file, body, 0o644); err != nil { //nolint:gosec // results are for everybody
			break
		}
		files = append(files, p.file)
	}
	if failed := <-loaded; err == nil {
		err = failed
	}
	return files, err
}
