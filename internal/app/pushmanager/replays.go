package pushmanager

import (
	"context"
	"errors"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/transport/ingress"
	"github.com/push-manager/push-manager/transport/replay"
)

func bindReplays(c *replay.Config, s *config.Set) {
	d := replay.Defaults()
	s.Int(&c.Concurrency, "replay_concurrency", d.Concurrency, 1, 1024, "Users who are sent stored messages at a time. The others wait in line; who has nothing stored waits for none of them.")
	s.Int(&c.Page, "replay_page", d.Page, 1, 1000, "Stored messages on their way to one user at a time, 256 KiB at most. A node may ask for less.")
}

// openReplays makes what sends users what is stored for them, if there is a store. It starts pushes once nodes ask, when there
// is an engine.
func (m *PushManager) openReplays(cfg *Config) (err error) {
	if m.store == nil {
		return nil
	}
	cfg.Replays.Store = m.store
	cfg.Replays.Start = func(p *engine.Push, c engine.Completer) error { return m.engine.Start(p, c) }
	replays, err := replay.New(cfg.Replays)
	if err != nil {
		return err
	}
	m.life.Add("replays", replays.Close)
	cfg.Links.Replayer, cfg.Ingress.Lasting = replays, lasting{replays}
	return nil
}

// lasting is the replays as the push API knows them.
type lasting struct{ *replay.Service }

// Replay implements ingress.Lasting.
func (l lasting) Replay(ctx context.Context, user, node string) (messages int, err error) {
	messages, err = l.Service.Replay(ctx, user, node)
	if errors.Is(err, replay.ErrNotTaken) {
		err = notTaken{err}
	}
	return messages, err
}

// notTaken is an ingress.ErrNotTaken that says once what the replay says.
type notTaken struct{ error }

func (notTaken) Is(target error) bool { return target == ingress.ErrNotTaken }
