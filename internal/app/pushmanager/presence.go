package pushmanager

import (
	"github.com/push-manager/push-manager/internal/app"
	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/transport/controller"
	"github.com/push-manager/push-manager/transport/presence"
)

// presenceConfig is the settings of presence.
type presenceConfig struct {
	presence.Config

	On bool
}

func (c *presenceConfig) bind(s *config.Set) {
	d := presence.Defaults()
	s.Bool(&c.On, "presence", true, "Tell callers with the right to it who is connected where (PresenceService).")
	s.Int(&c.Reads, "presence_reads", d.Reads, 1, 10_000, "Calls about presence, and looks at what is watched, that ask the Controller or Connect-Nodes at a time. Others wait.")
	s.Int(&c.Watched, "presence_watched", d.Watched, 1, 100_000, "Rooms and users that are watched (WatchPresence) at a time, those of the last minute included.")
	s.Int(&c.WatchedMembers, "presence_watched_members", d.WatchedMembers, 1, 1_000_000_000, "Members that watched rooms may have together when another one is to be watched: memory, 40 bytes for each.")
}

// openPresence makes what tells who is connected.
func (m *PushManager) openPresence(cfg *Config) (err error) {
	c := &cfg.Presence
	if !c.On {
		return nil
	}
	c.Controller, c.Room, c.Connections = m.controller, m.engine.Room, m.links.ListConnections
	if m.presence, err = presence.New(c.Config); err != nil {
		return err
	}
	m.life.Add("presence", app.Closing(m.presence.Close))
	cfg.Ingress.Presence = m.presence
	return nil
}

// changes is who is told what the Controller's change stream says: the routes first, then those who watch.
func (m *PushManager) changes() controller.Changes {
	if m.presence == nil {
		return m.directory
	}
	return m.presence.Following(m.directory)
}
