package pushmanager

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/push-manager/push-manager/internal/app"
	"github.com/push-manager/push-manager/internal/audit"
	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/webhook"
	"github.com/push-manager/push-manager/transport/ingress"
	"github.com/push-manager/push-manager/transport/store"
)

const (
	// webhookKey is what begins the keys in etcd of the turn and the position of the webhook.
	webhookKey = "/push-manager/webhook/receipts"
	// webhookDrain is how long an instance that ends goes on to send what is only in its memory, and what is under way.
	webhookDrain = 5 * time.Second
)

// webhookConfig is the section receipt_webhook.
type webhookConfig struct {
	webhook.Config

	SecretFile string
}

func (c *webhookConfig) bind(s *config.Set) {
	s.Text(&c.URL, "receipt_webhook.url", "", "URL that the receipts of all callers are sent to, as POST with JSON: https://HOST/PATH. It is shown with the settings, so put no secret into it. Empty: none.")
	s.Text(&c.SecretFile, "receipt_webhook.secret_file", "", "File with the secret, 16 bytes or more, that these requests are signed with. It is read again while it changes.")
	s.Duration(&c.Timeout, "receipt_webhook.timeout", 10*time.Second, 100*time.Millisecond, "How long one request with its answer may take.")
}

func (c *webhookConfig) on() bool { return c.URL != "" }

func (c *webhookConfig) validate(s *config.Set, risks *app.Risks) error {
	switch {
	case !c.on() && c.SecretFile != "":
		return s.Errorf("receipt_webhook.url", "missing, while receipt_webhook.secret_file is set")
	case !c.on():
		return nil
	case c.SecretFile == "":
		return s.Errorf("receipt_webhook.secret_file", "missing, while receipt_webhook.url is set")
	}
	u, err := webhook.CheckURL(c.URL)
	switch {
	case err != nil:
		return s.Errorf("receipt_webhook.url", "%v", err)
	case u.Scheme == "http" && !config.Loopback(u.Hostname()):
		if err := risks.Add("receipt_webhook.url", "receipts are sent to %q without TLS", u.Host); err != nil {
			return err
		}
	}
	if err := webhook.CheckSecret(c.SecretFile); err != nil {
		return s.Errorf("receipt_webhook.secret_file", "%v", err)
	}
	return nil
}

// openReceipts has receipts kept in the store, if there is one.
func (m *PushManager) openReceipts(cfg *Config) error {
	if m.store == nil {
		return nil
	}
	log, err := store.NewReceiptLog(store.ReceiptLogConfig{Receipts: m.store, Logger: m.log, Metrics: cfg.Store.Metrics})
	if err != nil {
		return err
	}
	m.life.Add("receipts", log.Close)
	cfg.Ingress.Receipts = receiptLog{log}
	return nil
}

// openWebhook has receipts sent to the webhook, if there is one: from the store, by one instance of all, or this instance's own.
func (m *PushManager) openWebhook(cfg *Config) error {
	c := &cfg.Webhook
	if !c.on() {
		return nil
	}
	secret, err := webhook.OpenSecret(webhook.SecretConfig{
		File: c.SecretFile, ReloadInterval: cfg.TLS.ReloadInterval, Logger: m.log, Metrics: c.Metrics,
		OnReload: func(err error) { auditReload(m.audit, audit.ConfigReloaded, "receipt webhook secret", err) },
	})
	if err != nil {
		return err
	}
	m.life.AddFiles("secret of the webhook", secret)
	c.Secret = secret.Current
	left := func() int { return 0 } // that nobody else sends
	if m.store != nil {
		c.Shared, c.Source = true, receiptSource{m.store}
		c.Turns = &webhook.EtcdTurns{Client: cfg.Discovery.Client, Prefix: webhookKey, Name: cfg.ManagerID, RequestTimeout: cfg.Etcd.RequestTimeout}
	} else {
		queue := webhook.NewQueue(c.Metrics)
		c.Source, c.Turns, cfg.Ingress.OnReceipt = queue, queue, queue.Append
		left = queue.Len
	}
	hook, err := webhook.Start(c.Config)
	if err != nil {
		return err
	}
	m.life.Add("webhook of receipts", app.WithTimeout(webhookDrain, func(ctx context.Context) error {
		hook.Drain(ctx)
		if n := left(); n > 0 {
			return fmt.Errorf("%d receipts were not sent: %w", n, context.Cause(ctx))
		}
		return nil
	}))
	return nil
}

// receiptLog is the log in the store as the push API knows it.
type receiptLog struct{ *store.ReceiptLog }

// Watch implements ingress.ReceiptLog.
func (l receiptLog) Watch(ctx context.Context, sender, after string) (ingress.ReceiptReader, error) {
	reader, err := l.ReceiptLog.Watch(ctx, sender, after)
	if err != nil {
		return nil, receiptError(err)
	}
	return receiptReader{reader}, nil
}

type receiptReader struct{ *store.ReceiptReader }

// Next implements ingress.ReceiptReader.
func (r receiptReader) Next(ctx context.Context, send func(position string, receipt []byte) error) (changed <-chan struct{}, err error) {
	changed, err = r.ReceiptReader.Next(ctx, send)
	return changed, receiptError(err)
}

// receiptError is an error of the log in words of the push API.
func receiptError(err error) error {
	switch {
	case errors.Is(err, store.ErrReceiptsGone):
		return ingress.ErrReceiptsGone
	case errors.Is(err, store.ErrReceiptPosition):
		return ingress.ErrReceiptPosition
	case errors.Is(err, store.ErrReceiptsElsewhere):
		return ingress.ErrReceiptsElsewhere
	}
	return err
}

// receiptSource is the line of receipts in the store as the webhook knows it.
type receiptSource struct{ store.Receipts }

// Read implements webhook.Source.
func (s receiptSource) Read(ctx context.Context, after webhook.Position, most, bytes int) (webhook.Page, error) {
	epoch, _, err := s.ReceiptsHead(ctx)
	if err != nil {
		return webhook.Page{}, err
	}
	if after.Epoch != epoch {
		after = webhook.Position{Epoch: epoch}
	}
	got, err := s.FollowReceipts(ctx, after.Seq, most, bytes)
	if err != nil {
		return webhook.Page{}, err
	}
	page := webhook.Page{Last: webhook.Position{Epoch: epoch, Seq: got.Last}, Missed: got.Missing}
	for _, r := range got.Receipts {
		page.Receipts = append(page.Receipts, webhook.Receipt{Position: store.ReceiptPosition(epoch, r.Seq), Sender: r.Sender, Content: r.Content})
	}
	return page, nil
}

// Head implements webhook.Source.
func (s receiptSource) Head(ctx context.Context) (p webhook.Position, err error) {
	p.Epoch, p.Seq, err = s.ReceiptsHead(ctx)
	return p, err
}
